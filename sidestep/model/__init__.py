"""ACE-Step checkpoints, as the classes of diffusers."""
