"""The thresholds of the checks, in one table, each with its reason."""

from typing import NamedTuple


class Limits(NamedTuple):
    """Thresholds; a ratio unless it says otherwise."""

    # How much is read
    sample: int = 1 << 14  # elements behind a mean or a standard deviation: good to one percent
    most_features: int = 1 << 14  # wider inputs are images or one-hot, which no feature table helps
    flat_logits: float = 0.02  # standard deviation of a row's logits, below which a softmax is flat
    several_rows: int = 8  # that are not the same by chance
    bad_rows: int = 16  # of a batch, that a remedy leaves out by number
    most_input_elements: int = 1 << 22
    calls_measured: int = 64  # of one module in one pass; a recurrence shows its trend in these
    counted: int = 1 << 11  # elements behind a histogram: a bin of average height is good to 15 percent
    bins: int = 40
    far_share: float = 0.002  # of the elements, on each side, that may lie beyond a histogram's ends
    plotted: int = 6  # layers with a histogram
    plotted_columns: int = 64  # features, channels or classes of one tensor
    scaled_rows: int = 64  # of images

    # Inputs
    scale_spread: float = 100.0  # of one feature against the median feature; two orders of magnitude
    spread_harmful: float = 1000.0  # at three, one feature has a million times the say in the first step
    input_rms: float = 50.0  # raw pixels (about 130) and prices exceed it, counts and z-scores do not
    input_rms_suspect: float = 8.0  # tried where the run shows symptoms
    input_rms_sure: float = 1e4  # seconds, populations: no weights expect it, whatever a few steps show
    offset: float = 30.0  # mean over reach: years, temperatures in kelvin

    # Weights
    growth: float = 1e3  # of the signal's standard deviation from the input to the worst layer
    growth_suspect: float = 30.0  # where weights are also far from their distribution
    shrink: float = 1e-5  # of the signal, or of gradients, from one end to the other: nothing is left for 16-bit types
    distribution_factor: float = 4.0  # standard deviation against the distribution; trained weights stay within 3
    dead: float = 0.9  # of a layer's units zero for every row of the batch
    zero_weights: float = 0.7  # of all layers; zero heads and branches on purpose are at most every other layer
    saturated: float = 0.5  # of tanh or sigmoid outputs within 1 % of their ends; unit inputs leave 1 % there

    # Uninitialised parameters
    garbage: float = 1e6  # magnitude of a starting weight; no distribution draws one
    denormal: float = 1e-25  # memory read as float is often this small; a distribution reaches it once in 1e20 draws
    denormal_share: float = 0.05

    # Gradients
    gradient_ratio: float = 1e4  # largest against smallest typical gradient over depth
    gradient_norm: float = 1e3  # per unit of loss: a step at a rate of 1e-3 moves weights by their own size
    gradient_norm_in_time: float = 1e2  # likewise, where a module runs again and again: each run multiplies
    forgotten: float = 1e-6  # the gradient of the first steps in time against the last ones
    recurrence: int = 10  # calls, or time steps, that make depth in time the suspect

    # Learning rate
    update_ratio: float = 0.5  # of an update to its weight; usual is 1e-3
    blow_up: float = 5.0  # of the loss along the steps: no further steps are needed to see it
    recovery: float = 0.1  # what the loss must have lost again, of its first value, for a rise to be a passing one
    rise: float = 1.15  # of the loss along one update; dropout and momentum make it rise by a few percent
    loss_excess: float = 3.0  # first loss against that of knowing nothing

    # Trials of a remedy
    trial_steps: int = 25  # a rate that is too large by little shows itself in these
    trial_least: int = 2  # steps that a trial takes however slow they are
    budget: float = 15.0  # seconds
    share_of_run: float = 0.2  # of the budget, for one run
    tried: int = 2  # remedies of a cause
    suspects: int = 5  # causes whose remedies are tried
    stays: float = 1e-3  # of a loss; a fall of less in a trial is none
    slow_fall: float = 0.02  # of a loss in a trial; a fall of less may be the rate's fault
    much_better: float = 1.5  # what is left of the loss without a remedy, against with it
    faster: float = 5.0  # times the fall without a remedy
    shifts: float = 3.0  # times the lowest end of all: a loss that ends there has only been shifted
    learns: float = 0.2  # of the first loss, gone in a trial: such a run needs no change
    above: float = 1.5  # likewise, of a run whose start was mended
    target_rms: float = 10.0  # of targets; prices, ages and counts exceed it
    target_offset: float = 3.0  # likewise, where all of them are far from 0: temperatures in kelvin, years
    reaches: float = 3.0  # the outputs' root mean square against the targets'
    outside: float = 0.1  # share of targets that the last activation cannot put out; a few outliers are none
    ordinary: float = 2.0  # times 1, of a root mean square: nothing that a run would fail from
    highest_rate: float = 1.0
    slow_update: float = 2e-5  # of an update to its weight; usual is 1e-3, and 1e-4 where trained models are tuned
    absurd: float = 1e8  # a loss that a run does not get below: nothing that falls from there has begun to learn
    passing: float = 10.0  # times the first loss: a rise that is made good within the trial
    settled: float = 1e-2  # of what the loss fell by: a change of less over five steps
    same_output: float = 1e-2  # spread of the outputs over the rows, against that of the targets
    hopeless: float = 1e4  # times the first loss: a run that is there is not run on
    given_back: float = 0.5  # of what the loss had fallen by: more, and it rises again
    same_value: float = 1e-4  # difference of two losses in float32 that are the same function

    # Runs that do not learn
    rounded_away: float = 0.99  # of 16-bit weights that a step leaves as they were; small rates leave half of them
    slow_rate: float = 1e-6
    disturbed: int = 8  # modules without a gradient that are looked at one by one
    response: float = 1e-6  # of the loss, to weights that no gradient reaches
    flat_input: float = 0.01  # what the rows of a batch change in a first layer's output, against its size

    stands_still: float = 0.02  # of the first loss, gone in a trial: a run that loses less may be stuck
    sets_going: float = 0.05  # likewise: a run that an intervention sets going loses as much at least
    floor: float = 0.05  # of the loss of knowing nothing: below, there is little left to fall
    nothing_left: float = 1e-3  # likewise, of a loss whose scale is not known
    hardly_an_update: float = 5e-6  # of an update to its weight, where the loss falls a little
    nearly_no_rate: float = 2e-4  # of the rate that a schedule has; 5,000 steps of warm-up begin there
    stale: float = 30.0  # of an optimizer's moments to the gradient's size; a loss falls to a tenth in training
    highest_momentum: float = 0.995  # 0.9 is usual, 0.99 rare: a mean over more than 200 steps
    highest_eps: float = 1e-2  # beside gradients of 1e-3 it is all that an adaptive step divides by
    large_decay: float = 0.01  # of the weights, gone in one step; usual is 1e-4 or less
    large_bias: float = 5.0  # beside signals near 1, it decides alone
    restarted: int = 3  # parameters that are drawn anew one by one
    nearly_all: float = 0.9  # of a signal, dropped: nobody means it
    much_noise: float = 0.8  # of a signal, dropped; 0.1 to 0.5 is usual

    # The first loss
    sure_loss: float = 5.0  # against knowing nothing; a model that starts wrong about some rows stays below
    sure_spread: float = 3.0  # of the logits: their largest probability is then near 1

    divided: float = 0.6  # of a loss function's value, the loss: a half at most where something divides it

    # Low precision
    headroom: float = 8.0  # three bits: what a few steps, or a less ordinary batch, use up
    zero_gradients: float = 0.1  # share of exact zeros in a 16-bit gradient that float32 does not have
    smallest_normal: float = 2.0**-14  # of float16: gradients below it lose bits, and below 2**-25 they are zero


LIMITS = Limits()
