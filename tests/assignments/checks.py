"""What is known about every exercise: a second way, numbers by hand, slips. Students do not get this."""

import checks_inside
import checks_rl
import checks_steering

CHECKS = {check.number: check for part in (checks_rl, checks_steering, checks_inside) for check in part.CHECKS}
