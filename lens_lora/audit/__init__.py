"""Audits: what an adapter was taught, found without a prompt about it."""
