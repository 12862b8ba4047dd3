"""What a run says while it trains: metric sinks, the progress display, and the last screen."""
