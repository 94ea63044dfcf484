"""Draw the benchmark's picture: one panel for each problem, beside the machine's limit."""

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
    """Write the picture: times relative to gluon's loss with static memory, with milliseconds as numbers."""
    cases = results['cases']
    rows = -(-len(cases) // COLUMNS)
    figure = Figure(figsize=(10, 2.3 * rows + 0.9), layout='constrained', facecolor='white')
    panels = figure.subplots(rows, COLUMNS, sharex=True, sharey=True, squeeze=False).ravel()
    for axes, (name, case) in zip(panels, cases.items()):
        draw_problem(axes, name, case)
    for axes in panels[len(cases) :]:
        axes.remove()
    panels[0].invert_yaxis()  # shared
    panels[0].set_xscale('log')
    about = results['machine']
    figure.suptitle(
        "Time of the loss, forward + backward, relative to gluon's loss with static memory, on a log scale; "
        f"numbers are ms.\nBars to the left are faster. The dotted line is the machine's limit. MXNet "
        f'{about["mxnet"]}, {about["cores"]} cores.',
        fontsize=10,
    )
    figure.savefig(path, dpi=110)


def three_digits(number):
    """Write a number with three digits, or all before the point, and no exponent unless it is tiny."""
    return f'{number:.0f}' if number >= 1000 else f'{number:.3g}'


def draw_problem(axes, name, case):
    """Draw a bar for each contender, from gluon's time with static memory to its own."""
    base, limit = (case['rows'][problems.STATIC]['both']['median'], case['limit']['both'])
    for place, contender in enumerate(COLORS):
        row = case['rows'].get(contender)
        if row is None:
            text = 'not measured' if contender in OPTIONAL else 'cannot solve this'
            axes.text(1.1, place, text, **SMALL_GREY)
            continue
        ratio = max(row['both']['median'] / base, limit / base)
        axes.barh(place, ratio - 1, left=1, height=0.75, color=COLORS[contender])
        axes.text(
            max(ratio, 1) * 1.1, place, three_digits(row['both']['median'] * 1e3), va='center', fontsize=8
        )
    axes.axvline(1, color='black', linewidth=1)
    axes.axvline(limit / base, color='black', linestyle=':', linewidth=1)
    axes.set_title(name, fontsize=9, loc='left')
    axes.set_yticks(range(len(COLORS)), list(COLORS), fontsize=8)
    axes.tick_params(axis='x', labelsize=8)
    axes.spines[['top', 'right']].set_visible(False)
