"""Which reader of the residual stream a site acts through."""
