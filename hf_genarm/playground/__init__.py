"""The playground: a page with two answers that stream side by side. It needs the extra `demo`."""
