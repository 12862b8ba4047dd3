"""Adam on a constant gradient in closed form (Kingma and Ba, algorithm 1, epsilon 0), sharing nothing with
src: the updates that follow an optimizer reset, in units of the learning rate.
"""


def updates_after_reset(*, betas, num_steps, count_at_reset):
    """`count_at_reset` updates are counted already when both moments are set to 0."""
    first, second = betas
    updates = []
    for n in range(1, num_steps + 1):
        count = count_at_reset + n
        mean = (1 - first**n) / (1 - first**count)
        variance = (1 - second**n) / (1 - second**count)
        updates.append(mean / variance**0.5)
    return updates
