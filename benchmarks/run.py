"""Measure ours against stock MXNet, in the same process: one table, as markdown and as a picture (``make bench``)."""
import argparse
import os
import platform
import sys

import cases
import measure
import mxnet as mx
from tqdm import tqdm

HERE = os.path.dirname(os.path.abspath(__file__))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--with-torch', metavar='PYTHON', help='a Python that has PyTorch, to measure beside')
    parser.add_argument('--only', default='', help='measure only cases with this in their name')
    parser.add_argument('--out', default=HERE, metavar='DIR', help='where results.md and results.png go')
    args = parser.parse_args()
    chosen = [(index, case) for index, case in enumerate(cases.CASES) if args.only in case.name]
    results = {'machine': machine(), 'cases': {}}
    for index, case in tqdm(chosen, unit='case', file=sys.stdout):
        results['cases'][case.name] = run_case(index, case, args.with_torch, results['machine']['bandwidth'])
    results['metrics'] = {name: measure.epochs(metrics, cases.UPDATES) for name, metrics in cases.make_metrics().items()}
    os.makedirs(args.out, exist_ok=True)
    text = markdown(results)
    with open(os.path.join(args.out, 'results.md'), 'w') as file:
        file.write(text)
    draw(results, os.path.join(args.out, 'results.png'))
    print('\n' + text)


def machine():
    """What the numbers were measured on."""
    return {'cores': os.cpu_count(), 'python': platform.python_version(), 'mxnet': mx.__version__, 'system': platform.system(),
            'architecture': platform.machine(), 'bandwidth': measure.bandwidth()}


def run_case(index, case, torch, bandwidth):
    """Times of all contenders in this process, memory in fresh ones, errors against float64."""
    steps = {name: made for name, made in ((name, cases.make(case, name)) for name in cases.CONTENDERS) if made}
    forward = measure.medians({name: step[0] for name, step in steps.items()})
    both = measure.medians({name: step[1] for name, step in steps.items()})
    truth = cases.truth(case, *cases.data(case))
    size = cases.data(case)[0].nbytes
    rows = {}
    for name, step in steps.items():
        rows[name] = {'forward': forward[name], 'both': both[name], **(measure.errors(step[2](), truth) if step[2] else {})}
    steps.clear()
    for name in rows:
        rows[name]['memory'] = measure.in_fresh_process(sys.executable, 'memory', index, name)
    if torch:
        rows[cases.TORCH] = measure.in_fresh_process(torch, 'torch', index)
        rows[cases.TORCH]['memory'] = measure.in_fresh_process(torch, 'memory', index, cases.TORCH)
    return {'rows': rows, 'limit': {'forward': size / bandwidth, 'both': 3 * size / bandwidth}, 'bytes': size}


def markdown(results):
    """The table, and what it was measured on."""
    about = results['machine']
    torch = next((row['version'] for case in results['cases'].values() for row in case['rows'].values() if 'version' in row), None)
    lines = [f"MXNet {about['mxnet']}{f', PyTorch {torch}' if torch else ''}, Python {about['python']}, {about['system']} "
             f"{about['architecture']}, {about['cores']} cores, which read and write {about['bandwidth'] / 1e9:.1f} GB/s. "
             "Times are medians, with quartiles in brackets; ratios are to gluon's loss, hybridized. The machine's limit is the time to "
             'read the logits once (forward), or to read them twice and write their gradient once (forward + backward).', '',
             '| logits | contender | forward, ms | forward + backward, ms | ratio | peak memory, MB | largest error, nats | relative |',
             '|---|---|---|---|---|---|---|---|']
    for name, case in results['cases'].items():
        base = case['rows'][cases.HYBRIDIZED]['both']['median']
        for contender, row in case['rows'].items():
            lines.append(f"| {name} | {contender} | {_time(row['forward'])} | {_time(row['both'])} | {row['both']['median'] / base:.2f} | "
                         f"{row['memory'] / 2 ** 20:.0f} | {_error(row, 'absolute')} | {_error(row, 'relative')} |")
        limit = case['limit']
        lines.append(f"| {name} | *the machine's limit* | {limit['forward'] * 1e3:.3g} | {limit['both'] * 1e3:.3g} | "
                     f"{limit['both'] / base:.2f} | | | |")
    lines += ['', f'Metrics: an update; and of an epoch of {cases.UPDATES} with the `get()` at its end, per update, so with what '
              'updates put off.', '',
              '| metric | contender | an update, us | ratio | an epoch, per update, us | ratio |', '|---|---|---|---|---|---|']
    for name, metrics in results['metrics'].items():
        for contender, row in metrics.items():
            cells = (f"{row[kind] * 1e6:.1f} | {row[kind] / metrics['stock'][kind]:.3f}" for kind in ('update', 'epoch'))
            lines.append(f"| {name} | {contender} | {' | '.join(cells)} |")
    lines += ['', '| ours, forward + backward or an update | relative to | at most | measured |', '|---|---|---|---|']
    for name, other, bound, ratio in bounds(results):
        lines.append(f"| {name} | {other} | {bound} | {ratio:.3f}{'' if ratio <= bound else ', not met'} |")
    return '\n'.join(lines) + '\n'


def bounds(results):
    """(case or metric, contender, bound, ratio measured) of each bound whose case was measured."""
    times = {name: {contender: row['both']['median'] for contender, row in case['rows'].items()} for name, case in results['cases'].items()}
    times.update({name: {contender: row['update'] for contender, row in metrics.items()} for name, metrics in results['metrics'].items()})
    return [(name, other, bound, times[name][cases.OURS] / times[name][other])
            for (name, other), bound in cases.BOUNDS.items() if name in times]


def _time(row):
    return f"{row['median'] * 1e3:.3g} ({row['low'] * 1e3:.3g} to {row['high'] * 1e3:.3g})"


def _error(row, kind):
    return f'{row[kind]:.1e}' if kind in row else ''


def draw(results, path):
    """Forward and backward of everybody, relative to gluon's hybridized loss."""
    import matplotlib
    matplotlib.use('Agg')
    from matplotlib import pyplot as plt
    names = list(results['cases'])
    contenders = [*cases.CONTENDERS, cases.TORCH]
    figure, axes = plt.subplots(figsize=(10, 0.9 * len(names) + 1.5), layout='constrained')
    for offset, contender in enumerate(contenders):
        points = [(case['rows'][contender]['both']['median'] / case['rows'][cases.HYBRIDIZED]['both']['median'], place)
                  for place, case in enumerate(results['cases'].values()) if contender in case['rows']]
        if points:
            axes.barh([place + (offset - 3) * 0.13 for _, place in points], [ratio for ratio, _ in points], height=0.12, label=contender)
    axes.axvline(1, color='black', linewidth=0.8)
    axes.set(xscale='log', xlabel='forward and backward, relative to the hybridized gluon loss (less is faster)',
             title=f"MXNet {results['machine']['mxnet']}, {results['machine']['cores']} cores")
    axes.set_yticks(range(len(names)))
    axes.set_yticklabels(names)
    axes.invert_yaxis()
    axes.margins(y=0.01)
    figure.legend(loc='outside lower center', ncols=4)
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == '__main__':
    main()
