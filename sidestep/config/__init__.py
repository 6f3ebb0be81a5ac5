"""Every setting, declared once; nothing here imports torch."""
