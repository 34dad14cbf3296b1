"""The main path on a GPU: the loops of denoise.py and decode.py with their arrays as torch tensors on the device.

Importing this package needs torch and triton; the rest of the runtime does not import it. engines/__init__.py does,
when a backend is asked for whose engines take device tensors (`DeviceEngine`).
"""
