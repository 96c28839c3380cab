from . import contraction as contraction
from . import rest as rest
from .check import check_meta_gradient as check_meta_gradient
from .contraction import spectral_radius as spectral_radius
from .optimality import column_space_condition as column_space_condition
from .verdict import Check as Check
