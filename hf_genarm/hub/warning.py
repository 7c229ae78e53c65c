"""The category of all warnings that this package gives."""


class GuidanceWarning(UserWarning):
    """A setting that works against guidance. `warnings.simplefilter("ignore", GuidanceWarning)` switches these off."""
