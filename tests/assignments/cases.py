"""All exercises with their cases."""

import cases_inside
import cases_rl
import cases_steering
from judge import Exercise
from table import FUNCTIONS

CASES = cases_rl.CASES | cases_steering.CASES | cases_inside.CASES
EXERCISES = {number: Exercise(number, CASES[number]) for number in FUNCTIONS}
