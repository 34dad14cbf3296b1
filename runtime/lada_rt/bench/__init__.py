"""What `lada-rt bench` does: measure a bundle, check what is measured, and say how far from the possible it is."""
