"""Tools around a model. Each file is a command of its own or something that train.py imports where it is used."""
