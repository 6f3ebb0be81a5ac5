"""From audio and text to tensor files, in two passes."""
