"""One short file a subcommand: read the config, open the sinks, call the engine."""
