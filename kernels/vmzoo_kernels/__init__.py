"""Shared 2D selective-scan operators: routes, a plain reference, and torch and Triton backends."""

from .backends import available_backends
from .ops import route_scan, selective_scan
from .projected import projected_scan
from .routes import (
    Routes,
    gather_routes,
    get_routes,
    join_map,
    merge_routes,
    route_names,
    routes_from_table,
    split_map,
)

__all__ = [
    'Routes',
    'available_backends',
    'gather_routes',
    'get_routes',
    'join_map',
    'merge_routes',
    'projected_scan',
    'route_names',
    'route_scan',
    'routes_from_table',
    'selective_scan',
    'split_map',
]
