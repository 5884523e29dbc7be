"""Gymnasium spaces: conversion of points to rows, batches of points, scaling, spaces as JSON."""

from safeshield.spaces.schema import check_same_space, part_of, space_from_json, space_to_json

__all__ = ["check_same_space", "part_of", "space_from_json", "space_to_json"]
