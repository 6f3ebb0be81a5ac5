"""To hear what was trained: samples while training, samples of finished adapters, a page to listen to."""
