"""Draw the benchmark's picture: one panel for each problem, with the machine's limit as a line."""

import problems
from matplotlib.figure import Figure

# Okabe and Ito's colours, which people with any colour vision can tell apart.
COLORS = {
    problems.OURS_STOCK: '#56B4E9',
    problems.OURS_FUSED: '#0072B2',
    problems.HYBRIDIZED: '#D55E00',
    problems.STATIC: '#E69F00',
    problems.EAGER: '#A0522D',
    problems.OUTPUT: '#999999',
    problems.SUM: '#555555',
    problems.TORCH: '#009E73',
}
COLUMNS = 2
OPTIONAL = (problems.OURS_FUSED, problems.TORCH)  # which may not be installed
SMALL_GREY = {'va': 'center', 'fontsize': 8, 'color': '#666666', 'style': 'italic'}


def draw(results, path):
    """Write the picture: times as multiples of the machine's limit, with milliseconds as numbers."""
    cases = results['cases']
    rows = -(-len(cases) // COLUMNS)
    figure = Figure(figsize=(10, 2.15 * rows + 0.9), layout='constrained', facecolor='white')
    panels = figure.subplots(rows, COLUMNS, sharex=True, sharey=True, squeeze=False).ravel()
    for axes, (name, case) in zip(panels, cases.items()):
        draw_problem(axes, name, case)
    for axes in panels[len(cases) :]:
        axes.remove()
    panels[0].invert_yaxis()  # shared
    panels[0].set_xscale('log')
    panels[0].set_xlim(0.3, 6 * largest_multiple(cases))  # room for the numbers
    about = results['machine']
    figure.suptitle(
        "The loss, forward + backward, in ms. A bar shows how many times the machine's limit that is, "
        f'on a log scale.\nThe dashed line is the limit. Shorter is faster. MXNet {about["mxnet"]}, '
        f'{about["cores"]} cores.',
        fontsize=10,
    )
    figure.supxlabel("times the machine's limit", fontsize=10)
    figure.savefig(path, dpi=110)


def three_digits(number):
    """Write a number with three digits, or all before the point, and no exponent unless it is tiny."""
    return f'{number:.0f}' if number >= 1000 else f'{number:.3g}'


def largest_multiple(cases):
    """Return the time of the slowest contender, in multiples of the machine's limit."""
    return max(
        row['both']['median'] / case['limit']['both']
        for case in cases.values()
        for row in case['rows'].values()
    )


def draw_problem(axes, name, case):
    """Draw a bar for each contender, from the limit to its time."""
    limit = case['limit']['both']
    for place, contender in enumerate(COLORS):
        row = case['rows'].get(contender)
        if row is None:
            axes.text(
                1.15, place, 'not measured' if contender in OPTIONAL else 'cannot solve this', **SMALL_GREY
            )
            continue
        multiple = max(row['both']['median'] / limit, 1e-3)
        axes.barh(place, multiple - 1, left=1, height=0.75, color=COLORS[contender])
        axes.text(
            max(multiple, 1) * 1.12, place, three_digits(row['both']['median'] * 1e3), va='center', fontsize=8
        )
    axes.axvline(1, color='black', linestyle='--', linewidth=1)
    axes.set_title(f'{name} (limit {limit * 1e3:.2g} ms)', fontsize=9, loc='left')
    axes.set_yticks(range(len(COLORS)), list(COLORS), fontsize=8)
    axes.tick_params(axis='x', labelsize=8)
    axes.spines[['top', 'right']].set_visible(False)
