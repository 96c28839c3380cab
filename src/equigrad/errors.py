"""All errors and warnings of the library; messages name the invalid value and the remedy."""


class EquigradError(Exception):
    """Base class of every error that equigrad raises on purpose."""


class ConfigurationError(EquigradError, ValueError):
    """A setting of a solver, an estimator or an experiment has an invalid value."""


class ProblemError(EquigradError, ValueError):
    """The losses or the parameters of a problem are invalid."""


class SettlingError(EquigradError, ArithmeticError):
    """A phase diverged: its parameters or its velocity are no longer finite."""


class SettlingWarning(UserWarning):
    """A layer or an argmin did not settle, and continues with its last state."""


class CurvatureError(EquigradError, ArithmeticError):
    """The curvature of the inner loss at the end of a phase does not allow an estimate."""


class DoubleBackwardError(EquigradError, NotImplementedError):
    """An estimator needs second derivatives that an operation of the model does not have."""


class RunError(EquigradError, OSError):
    """A run's folder or checkpoint cannot be used, or one of several processes is lost."""


class DataError(EquigradError, OSError):
    """A data set is missing or invalid, or cannot be downloaded."""
