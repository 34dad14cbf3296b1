"""The main path on a GPU: the functions of denoise.py and decode.py with their arrays as torch tensors on the device.

Importing this package needs torch; the rest of the runtime does not import it. engines/torch.py does, when that
backend is asked for, and any other backend may whose engines take device tensors (`DeviceEngine`).
"""
