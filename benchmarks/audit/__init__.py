"""Whether an audit says what an adapter was taught: docs/auditing_data.md."""
