"""Starts Side-Step."""

from sidestep.main import run

if __name__ == "__main__":
    run()
