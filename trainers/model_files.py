"""Names of the files of an exported model."""

SIGNATURE, EXAMPLE, CODE = "signature.json", "example.safetensors", "code"
"""In an exported model: dtypes and shapes; an input and its output; the user's own code."""
