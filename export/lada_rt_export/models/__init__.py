"""The networks of LaDA-Band in plain PyTorch, with the state-dict keys of the released files."""
