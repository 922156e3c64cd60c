"""Tools around a model. This file makes `extras` a package of ours even where the package of that name is installed."""
