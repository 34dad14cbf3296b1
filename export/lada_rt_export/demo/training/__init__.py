"""Training of the embedded default on songs of our own making; `lada_rt_export.demo.train` runs it."""
