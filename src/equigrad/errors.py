"""What can go wrong, each kind once; every message names the value and the remedy."""


class EquigradError(Exception):
    """Base of every error that equigrad raises on purpose."""


class ConfigurationError(EquigradError, ValueError):
    """A knob of a solver, an estimator or an experiment has a value that cannot work."""


class ProblemError(EquigradError, ValueError):
    """The losses or the parameters of a problem are not what they have to be."""


class SettlingError(EquigradError, ArithmeticError):
    """A phase diverged: its parameters or its velocity are no longer finite."""


class SettlingWarning(UserWarning):
    """A layer or an argmin did not settle, and goes on with where it stopped."""


class CurvatureError(EquigradError, ArithmeticError):
    """The inner loss does not curve as an estimator needs it to, where a phase settled."""


class DoubleBackwardError(EquigradError, NotImplementedError):
    """An estimator needs second derivatives that an operation of the model does not have."""


class RunError(EquigradError, OSError):
    """A run's folder or checkpoint cannot be used, or one of several processes is lost."""


class DataError(EquigradError, OSError):
    """A data set is missing, is not what it has to be, or cannot be fetched."""
