"""``--sp-backend auto``: times candidates on the first calls of a shape and selects the fastest."""
