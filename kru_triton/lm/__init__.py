"""The language model: blocks around any mixer, and the presets."""
