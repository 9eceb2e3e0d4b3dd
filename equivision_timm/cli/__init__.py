"""Commands that measure and draw: those that draw need the extra `tools`, matplotlib."""
