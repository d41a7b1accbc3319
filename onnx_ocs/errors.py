"""What can go wrong with a user's model or data; a caller's bug is a ``ValueError`` instead."""


class OcsError(Exception):
    """One clear line: what, where, and what to do."""


class UnsupportedModel(OcsError):
    """The model cannot be read, or what was asked cannot be done to it."""


class BadSamples(OcsError):
    """The samples do not fit the inputs of the model."""


class CannotWrite(OcsError):
    """The target cannot be written."""


class RuntimeFailed(OcsError):
    """onnxruntime crashed, ran out of time, or refused a model that it has to run."""


class VerificationFailed(OcsError):
    """The transformed model does not compute what it has to; nothing was written."""


class BadRecipe(OcsError):
    """A file that was given as a recipe is none."""
