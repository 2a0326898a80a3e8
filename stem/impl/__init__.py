"""How a selection is attended to: one module per implementation."""
