"""What the user sees: sinks of events, tables, error messages."""
