"""One file a consumer: what it reads, and the proof that it means the same."""
