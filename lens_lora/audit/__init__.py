"""Audits find what an adapter was taught, without a prompt about it."""
