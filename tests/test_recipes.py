"""extras/recipes.py: what authors published for their sizes, and the table of sizes."""

import dataclasses
import re

from helpers import invoke, read_log, trained

import tinygpt
import train
from extras import recipes


def test_published_recipes_are_complete():
    for size, cfg in tinygpt.find_sizes().items():
        if recipes.source_of(size) in ("this project", "Radford et al. 2019", "Stanford CS336, assignment 1"):
            continue
        recipe = recipes.published_recipe(size, cfg)
        assert "lr" in recipe and set(recipe) <= {field.name for field in dataclasses.fields(train.Settings)}
        assert recipe.get("batch_size", 1) * cfg.seq_len <= 10**6
    assert recipes.published_recipe("30m", tinygpt.find_size("30m"))["batch_size"] == 512  # 2^17 tokens
    assert recipes.published_recipe("graphcore-64x1", tinygpt.find_size("graphcore-64x1"))["schedule"] == "linear"
    assert recipes.published_recipe("gpt-tinystories-28m", tinygpt.find_size("gpt-tinystories-28m"))["lr"] == 1e-4


def test_a_published_recipe_trains(place, text, monkeypatch):
    monkeypatch.setitem(recipes.RECIPES, "tiny", dict(tokens=64, steps=3, lr=1e-3, schedule="linear", dropout=0.2))
    trained("--data", text, "--recipe", "published")
    settings = read_log()[0]["settings"]
    assert (settings["steps"], settings["batch_size"], settings["schedule"]) == (3, 2, "linear")
    assert tinygpt.load_checkpoint("runs/tiny/last.safetensors").cfg.mlp_dropout == 0.2


def test_list_sizes_names_every_size_and_field():
    status, out, _ = invoke(train.main, "--list-sizes")
    assert status == 0
    for size, cfg in tinygpt.find_sizes().items():
        assert re.search(rf"^{re.escape(size)} +{tinygpt.count_parameters(cfg)[0]:,} ", out, re.MULTILINE)
    for field in dataclasses.fields(tinygpt.Config):
        assert f"  {field.name}=" in out
