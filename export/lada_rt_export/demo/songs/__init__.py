"""Songs of our own making: form, melody, voice, instruments, mix. Everything follows from a seed."""
