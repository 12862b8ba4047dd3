"""Bridges to other packages, each optional; the method finds those it needs by entry point."""
