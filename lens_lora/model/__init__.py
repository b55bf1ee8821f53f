"""Where an adapter meets a hooked model: sites, hosts, hooks, gates, and the lens over them."""
