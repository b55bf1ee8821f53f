"""A real model and a trained adapter that need no network: what the demos and the tests run on."""
