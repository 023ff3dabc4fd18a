"""The faces of the packages: what they export is what is there, and what is public says what it is."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from importlib.metadata import entry_points
from types import ModuleType
from typing import Any

import pytest

import channels
import engine
import engine.core
import engine.data.importers
import filters
from engine.core.channel import Channel
from engine.core.filter import Filter
from engine.core.options import Options


@pytest.mark.parametrize(
    "name",
    ["engine.testing", "engine.client", "engine.config", "engine.data.snapshot", "engine.models.features"],
)
def test_what_a_package_exports_is_what_its_all_says(name):
    package = importlib.import_module(name)
    public = {
        each
        for each, value in vars(package).items()
        if not each.startswith("_") and not isinstance(value, ModuleType) and each != "annotations"
    }
    assert set(package.__all__) == public
    for each in package.__all__:
        value = getattr(package, each)
        if hasattr(value, "__module__"):
            assert value.__module__.startswith(name), f"{each} is of {value.__module__}"


def test_every_importer_is_offered_under_its_modules_name():
    modules = [each.name for each in pkgutil.iter_modules(engine.data.importers.__path__)]
    offered = engine.data.importers.IMPORTERS
    assert set(modules) - {"source"} == set(offered)
    for name, importer in offered.items():
        assert importer.__module__ == f"engine.data.importers.{name}"
        assert importer.__name__ == f"import_{name}"
        for option in engine.data.importers.importer_options(name).values():
            assert option.default is not inspect.Parameter.empty


def modules_of(package: ModuleType) -> Iterator[ModuleType]:
    yield package
    for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        yield importlib.import_module(found.name)


MODULES = [module for package in (engine.core, channels, filters) for module in modules_of(package)]


def public_of(module: ModuleType) -> Iterator[tuple[str, Any]]:
    """What a module defines, and the methods of its classes."""
    for name, value in vars(module).items():
        value = getattr(value, "py_func", value)  # a compiled kernel is spoken of by its Python function
        if name.startswith("_") or getattr(value, "__module__", None) != module.__name__:
            continue
        if inspect.isclass(value) or inspect.isfunction(value):
            yield name, value
        if inspect.isclass(value):
            for member, method in vars(value).items():
                method = getattr(method, "__func__", method)
                if not member.startswith("_") and (
                    inspect.isfunction(method) or isinstance(method, property)
                ):
                    yield f"{name}.{member}", method


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_whatever_is_public_says_what_it_is(module):
    assert module.__doc__
    silent = [name for name, value in public_of(module) if not (value.__doc__ or "").strip()]
    assert not silent


@pytest.mark.parametrize(("group", "base"), [("recall.channels", Channel), ("recall.filters", Filter)])
def test_what_ships_is_an_entry_point_of_its_modules_name_with_documented_options(group, base):
    package = {Channel: channels, Filter: filters}[base]
    points = {point.name: point.load() for point in entry_points(group=group)}
    ours = {name: found for name, found in points.items() if found.__module__.startswith(package.__name__)}
    # A channel of several modules is a package of its own, whose modules are the channel's affair.
    assert {".".join(found.__module__.split(".")[:2]) for found in ours.values()} == {
        f"{package.__name__}.{found.name}" for found in pkgutil.iter_modules(package.__path__)
    }
    for name, found in ours.items():
        assert issubclass(found, base)
        assert found.__module__.split(".")[1] == name
        assert issubclass(found.Config, Options)
        for option, field in found.Config.model_fields.items():
            assert field.description, f"{name}.{option} has no docstring"
            assert not field.is_required(), f"{name}.{option} has no default"


def test_the_version_is_one():
    assert engine.__version__.count(".") == 2
