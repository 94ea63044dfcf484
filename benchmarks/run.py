"""Compare the package with stock MXNet in the same process (``make bench``)."""

import argparse
import os
import platform
import sys

import cases
import measure
import mxnet as mx
from tqdm import tqdm

HERE = os.path.dirname(os.path.abspath(__file__))
QUICK = {'memory': False, 'seconds': 0.2, 'least': 3}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--with-torch', metavar='PYTHON', help='a Python that has PyTorch, to measure it too')
    parser.add_argument(
        '--out', default=HERE, metavar='DIR', help='where results.md and results.png are written'
    )
    parser.add_argument(
        '--only',
        metavar='NAME',
        help='print short measurements, without memory, of the cases and '
        'metrics with NAME in their names; write no files',
    )
    args = parser.parse_args()
    results = run(args.with_torch, args.only or '', **(QUICK if args.only else {}))
    text = markdown(results)
    print('\n' + text)
    if not args.only:
        os.makedirs(args.out, exist_ok=True)
        with open(os.path.join(args.out, 'results.md'), 'w') as file:
            file.write(text)
        draw(results, os.path.join(args.out, 'results.png'))


def run(torch, only='', memory=True, **effort):
    """Measure the cases and metrics with `only` in their names."""
    results = {'machine': machine(), 'cases': {}, 'metrics': {}}
    for index, case in enumerate(tqdm(cases.CASES, unit='case', disable=None)):
        if only in case.name:
            results['cases'][case.name] = run_case(
                index, torch, results['machine']['bandwidth'], memory, **effort
            )
    for name in (cases.PROBS, cases.LOSSES):
        if only in name:
            results['metrics'][name] = measure.epochs(cases.make_metrics(name), cases.UPDATES, **effort)
    return results


def machine():
    """Describe the machine and the versions."""
    return {
        'cores': os.cpu_count(),
        'python': platform.python_version(),
        'mxnet': mx.__version__,
        'system': platform.system(),
        'architecture': platform.machine(),
        'bandwidth': measure.bandwidth(),
    }


def run_case(index, torch, bandwidth, memory, **effort):
    """Measure times of all contenders in this process, memory in fresh ones, and errors against float64."""
    case = cases.CASES[index]
    steps = {name: cases.make(case, name) for name in cases.CONTENDERS}
    steps = {name: step for name, step in steps.items() if step}
    forward = measure.medians({name: step[0] for name, step in steps.items()}, **effort)
    both = measure.medians({name: step[1] for name, step in steps.items()}, **effort)
    truth = cases.truth(case)
    rows = {}
    for name, step in steps.items():
        errors = measure.errors(step[2](), truth) if step[2] else {}
        rows[name] = {'forward': forward[name], 'both': both[name], **errors}
    steps.clear()
    if torch:
        rows[cases.TORCH] = measure.in_fresh_process(torch, 'torch', index)
    for name, row in rows.items() if memory else ():
        python = torch if name == cases.TORCH else sys.executable
        row['memory'] = measure.in_fresh_process(python, 'memory', index, name)
    size = sum(pred.nbytes for pred, _ in cases.data(case))
    return {'rows': rows, 'limit': {'forward': size / bandwidth, 'both': 3 * size / bandwidth}}


def markdown(results):
    """Return the tables, under a description of the machine."""
    about = results['machine']
    rows = [row for case in results['cases'].values() for row in case['rows'].values()]
    torch = ''.join({f', PyTorch {row["version"]}' for row in rows if 'version' in row})
    description = (
        f'MXNet {about["mxnet"]}{torch}, Python {about["python"]}, {about["system"]} '
        f'{about["architecture"]}, {about["cores"]} cores, '
        f'which read and write {about["bandwidth"] / 1e9:.1f} GB/s. '
        'A call solves one batch, or one batch of each length T. '
        "Times are medians, with quartiles in brackets; ratios are to gluon's loss, hybridized. "
        "The machine's limit is the time to read the logits once (forward), or to read them twice and write "
        'their gradient once (forward + backward). '
        f'An epoch of a metric is {cases.UPDATES} updates and a `get()`; its time is given per update.\n\n'
    )
    tables = [
        table(
            ['logits', 'contender', 'forward, ms', 'forward + backward, ms', 'ratio']
            + ['peak memory, MB', 'largest error, nats', 'relative'],
            [cells for name, case in results['cases'].items() for cells in case_cells(name, case)],
        ),
        table(
            ['metric', 'contender', 'an update, us', 'ratio', 'an epoch, per update, us', 'ratio'],
            [cells for name, metrics in results['metrics'].items() for cells in metric_cells(name, metrics)],
        ),
        table(
            ['ours: forward + backward, or what is named of a metric', 'relative to', 'at most', 'measured'],
            [
                (name, other, bound, f'{ratio:.3f}' + ('' if ratio <= bound else ', not met'))
                for name, other, bound, ratio in bounds(results)
            ],
        ),
    ]
    return description + '\n'.join(filter(None, tables))


def table(head, rows):
    """Return a table in markdown, or nothing if it has no rows."""
    if not rows:
        return ''
    return ''.join(f'| {" | ".join(map(str, cells))} |\n' for cells in [head, ['---'] * len(head), *rows])


def case_cells(name, case):
    """Yield the cells of each contender, and those of the machine's limit."""
    base = case['rows'][cases.HYBRIDIZED]['both']['median']
    for contender, row in case['rows'].items():
        times = _time(row['forward']), _time(row['both']), f'{row["both"]["median"] / base:.2f}'
        memory = f'{row["memory"] / 2**20:.0f}' if 'memory' in row else ''
        yield (name, contender, *times, memory, _error(row, 'absolute'), _error(row, 'relative'))
    limits = [f'{case["limit"][kind] * 1e3:.3g}' for kind in ('forward', 'both')]
    yield (name, "*the machine's limit*", *limits, f'{case["limit"]["both"] / base:.2f}', '', '', '')


def metric_cells(name, metrics):
    """Yield the cells of each contender."""
    stock = metrics[cases.STOCK]
    for contender, row in metrics.items():
        update, epoch = ((f'{row[k] * 1e6:.1f}', f'{row[k] / stock[k]:.3f}') for k in ('update', 'epoch'))
        yield (name, contender, *update, *epoch)


def bounds(results):
    """Return (what, contender, bound, ratio measured) of each bound that was measured."""
    times = {}
    for name, case in results['cases'].items():
        times[name] = {contender: row['both']['median'] for contender, row in case['rows'].items()}
    for name, metrics in results['metrics'].items():
        for kind in ('update', 'epoch'):
            times[f'{name}, {kind}'] = {contender: row[kind] for contender, row in metrics.items()}
    return [
        (name, other, bound, times[name][cases.OURS] / times[name][other])
        for (name, other), bound in cases.BOUNDS.items()
        if name in times
    ]


def _time(row):
    return f'{row["median"] * 1e3:.3g} ({row["low"] * 1e3:.3g} to {row["high"] * 1e3:.3g})'


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
        points = [
            (
                case['rows'][contender]['both']['median'] / case['rows'][cases.HYBRIDIZED]['both']['median'],
                place,
            )
            for place, case in enumerate(results['cases'].values())
            if contender in case['rows']
        ]
        if points:
            axes.barh(
                [place + (offset - 3) * 0.13 for _, place in points],
                [ratio for ratio, _ in points],
                height=0.12,
                label=contender,
            )
    axes.axvline(1, color='black', linewidth=0.8)
    axes.set(
        xscale='log',
        xlabel='forward and backward, relative to the hybridized gluon loss (less is faster)',
        title=f'MXNet {results["machine"]["mxnet"]}, {results["machine"]["cores"]} cores',
    )
    axes.set_yticks(range(len(names)))
    axes.set_yticklabels(names)
    axes.invert_yaxis()
    axes.margins(y=0.01)
    figure.legend(loc='outside lower center', ncols=4)
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == '__main__':
    main()
