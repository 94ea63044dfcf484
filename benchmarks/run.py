"""Compare the package with stock MXNet in the same process, and with PyTorch (``make bench``).

Example: ``python benchmarks/run.py --only 'axis 1' --with-torch .venv-torch/bin/python``
"""

import argparse
import json
import os
import platform
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import draw
import measure
import mxnet as mx
import problems
from tqdm import tqdm

HERE = os.path.dirname(os.path.abspath(__file__))
FULL, QUICK = {'seconds': 0.8, 'least': 7}, {'seconds': 0.2, 'least': 3}  # for each contender
STEPS_OF_A_CASE = 4  # of the progress bar: forward, forward and backward, PyTorch, memory


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0], epilog=__doc__.split('\n')[2])
    parser.add_argument('--with-torch', metavar='PYTHON', help='a Python that has PyTorch, to measure it too')
    parser.add_argument(
        '--out', default=HERE, metavar='DIR', help='where results.md and results.png are written'
    )
    parser.add_argument(
        '--only',
        metavar='NAME',
        help='print short measurements, without memory, of what has NAME in its name; write no files',
    )
    parser.add_argument('--quick', action='store_true', help='measure few repetitions, to test the benchmark')
    args = parser.parse_args()
    effort = QUICK if args.quick or args.only else FULL
    results = run(args.with_torch, args.only or '', not args.only, effort)
    text = markdown(results)
    print('\n' + text)
    if not args.only:
        os.makedirs(args.out, exist_ok=True)
        with open(os.path.join(args.out, 'results.md'), 'w') as file:
            file.write(text)
        draw.draw(results, os.path.join(args.out, 'results.png'))


def run(torch, only='', memory=True, effort=FULL):
    """Measure what has `only` in its name: the loss alone, training steps, metrics."""
    results = {'machine': machine(), 'cases': {}, 'nets': {}, 'metrics': {}}
    chosen = [index for index, case in enumerate(problems.CASES) if only in case.name]
    nets = [net for net in problems.NETS if only in net.name]
    metrics = [name for name in problems.UPDATES if only in name]
    total = STEPS_OF_A_CASE * len(chosen) + len(nets) + len(metrics)
    with tqdm(total=total, unit='step', disable=None) as progress:
        for index in chosen:
            name = problems.CASES[index].name
            results['cases'][name] = run_case(index, torch, results['machine'], memory, effort, progress)
        for net in nets:
            results['nets'][net.name] = advance(progress, net.name, partial(run_net, net, effort))
        for name in metrics:
            measured = advance(progress, name, partial(run_metric, name, effort))
            results['metrics'][name] = {
                'rows': measured,
                'limit': (problems.bytes_read(name) or 0) / results['machine']['bandwidth'],
            }
    return results


def advance(progress, what, call):
    """Say what is measured, measure it, and move the progress bar."""
    progress.set_description(what)
    result = call()
    progress.update()
    return result


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


def run_case(index, torch, about, memory, effort, progress):
    """Measure times, errors and memory of all contenders."""
    case, step = problems.CASES[index], partial(advance, progress)
    rows = run_mxnet(case, effort, step)
    rows.update(step(f'{case.name}, PyTorch', partial(run_torch, index, torch, effort)))
    used = step(f'{case.name}, memory', partial(memory_of, index, list(rows) if memory else [], torch))
    for name, size in used.items():
        rows[name]['memory'] = size
    sizes = [pred.nbytes for pred, *_ in problems.data(case)]
    seconds = sum(sizes) / about['bandwidth']
    return {'rows': rows, 'gradient': max(sizes), 'limit': {'forward': seconds, 'both': 3 * seconds}}


def run_mxnet(case, effort, step):
    """Return the rows of the contenders that run in this process, with errors against float64."""
    batches = problems.inputs(case)
    steps = {name: problems.make(case, name, batches) for name in [problems.OPERATOR, *problems.CONTENDERS]}
    steps = {name: one for name, one in steps.items() if one}
    forward = step(f'{case.name}, forward', partial(measure.time_of, steps, 'forward', effort))
    both = step(f'{case.name}, forward + backward', partial(measure.time_of, steps, 'both', effort))
    truth = problems.truth(case)
    rows = {}
    for name in forward:
        losses = steps[name].losses
        errors = measure.errors(losses(), truth) if losses else {}
        rows[name] = {'forward': forward[name], 'both': both[name], **errors}
    return rows


def run_torch(index, torch, effort):
    """Return PyTorch's row, if there is a PyTorch."""
    if not torch:
        return {}
    return {problems.TORCH: measure.in_fresh_process(torch, 'torch', index, json.dumps(effort))}


def memory_of(index, names, torch):
    """Return each contender's peak memory in bytes, less that of the operator alone, two at a time."""
    kinds = {name: 'torch' if name == problems.TORCH else 'mxnet' for name in names}
    wanted = [
        *((name, kind) for name, kind in kinds.items()),
        *((problems.OPERATOR, kind) for kind in set(kinds.values())),
    ]

    def peak(one):
        python = torch if one[1] == 'torch' else sys.executable
        return measure.in_fresh_process(python, 'memory', index, *one)

    with ThreadPoolExecutor(2) as pool:
        peaks = dict(zip(wanted, pool.map(peak, wanted)))
    return {name: max(peaks[name, kind] - peaks[problems.OPERATOR, kind], 0) for name, kind in kinds.items()}


def run_net(net, effort):
    """Return the times of a whole training step."""
    steps = {name: problems.make_net(net, name) for name in problems.NET_CONTENDERS}
    return measure.medians({name: step for name, step in steps.items() if step}, **effort)


def run_metric(name, effort):
    """Return the times of a metric's update, and of an epoch per update."""
    return measure.epochs(problems.make_metrics(name), problems.UPDATES[name], **effort)


def markdown(results):
    """Return the tables, under a description of the machine and of what was measured."""
    tables = [
        table(
            ['logits', 'contender', 'forward, ms', 'forward + backward, ms', 'ratio', 'to the best other']
            + ['bandwidth', 'peak memory, MB', 'largest error, nats', 'relative'],
            [cells for name, case in results['cases'].items() for cells in case_cells(name, case)],
        ),
        table(
            ['a whole training step', 'loss', 'time, ms', 'ratio'],
            [cells for name, rows in results['nets'].items() for cells in net_cells(name, rows)],
        ),
        table(
            ['metric', 'contender', 'an update, us', 'ratio', 'an epoch, per update, us', 'ratio'],
            [cells for name, metric in results['metrics'].items() for cells in metric_cells(name, metric)],
        ),
        bounds_table(results),
    ]
    return describe(results) + '\n'.join(filter(None, tables))


def describe(results):
    """Return a paragraph about the machine, and one about what was measured."""
    about = results['machine']
    rows = [row for case in results['cases'].values() for row in case['rows'].values()]
    torch = ''.join({f', PyTorch {row["version"]}' for row in rows if 'version' in row})
    return (
        f'MXNet {about["mxnet"]}{torch}, Python {about["python"]}, {about["system"]} '
        f'{about["architecture"]}, {about["cores"]} cores, '
        f'which read and write {about["bandwidth"] / 1e9:.1f} GB/s.\n\n'
        'The logits come out of an operator inside `record`, as the logits of a net do. The operator is a '
        'copy. Its own forward and backward are measured alone, and their time is taken off that of each '
        'contender in the same round. The same is done for PyTorch, and for the memory. So the numbers are '
        'those of the loss alone. '
        'A call solves one batch, or one batch of each length T.\n\n'
        'Times are medians, with quartiles in brackets. The contenders take turns in one process; PyTorch '
        "has a process of its own. Quartiles are left out where the operator's time differs more from round "
        "to round than the loss takes. Ratios are to gluon's loss, hybridized with static memory. The best "
        'other is the faster one of that and PyTorch. '
        "The machine's limit is the time to read the logits once (forward), or to read them twice and write "
        'their gradient once (forward + backward). It assumes that no logits are in a cache. The share of '
        'the bandwidth is the limit divided by the time. '
        'A training step is forward, loss, backward and update of a dense layer. '
        'An epoch of a metric is some updates and a `get()`; its time is given per update.\n\n'
    )


def table(head, rows):
    """Return a table in markdown, or nothing if it has no rows."""
    if not rows:
        return ''
    return ''.join(f'| {" | ".join(map(str, cells))} |\n' for cells in [head, ['---'] * len(head), *rows])


def case_cells(name, case):
    """Yield the cells of each contender, and those of the machine's limit."""
    both = {contender: row['both']['median'] for contender, row in case['rows'].items()}
    base, limit = both[problems.STATIC], case['limit']['both']
    best = min(both[rival] for rival in problems.RIVALS if rival in both)
    for contender, row in case['rows'].items():
        times = [_time(row[kind]) for kind in ('forward', 'both')]
        ratios = [_ratio(both[contender] / other) for other in (base, best)]
        memory = f'{row["memory"] / 2**20:.0f}' if 'memory' in row else ''
        share = f'{limit / both[contender]:.0%}'
        yield (
            name,
            contender,
            *times,
            *ratios,
            share,
            memory,
            _error(row, 'absolute'),
            _error(row, 'relative'),
        )
    limits = [draw.three_digits(case['limit'][kind] * 1e3) for kind in ('forward', 'both')]
    yield (
        name,
        f'*{problems.LIMIT}*',
        *limits,
        _ratio(limit / base),
        _ratio(limit / best),
        '100%',
        '',
        '',
        '',
    )


def net_cells(name, rows):
    """Yield the cells of each loss."""
    base = rows[problems.STATIC]['median']
    for contender, row in rows.items():
        yield (name, contender, _time(row), _ratio(row['median'] / base))


def metric_cells(name, metric):
    """Yield the cells of each contender, and those of the machine's limit."""
    rows = metric['rows']
    base = rows.get(problems.STOCK) or rows[problems.OURS_STOCK]
    for contender, row in rows.items():
        update, epoch = ((f'{row[k] * 1e6:.1f}', _ratio(row[k] / base[k])) for k in ('update', 'epoch'))
        yield (name, contender, *update, *epoch)
    if metric['limit']:
        ratio = _ratio(metric['limit'] / base['epoch'])
        yield (name, f'*{problems.LIMIT}*', '', '', f'{metric["limit"] * 1e6:.1f}', ratio)


def bounds_table(results):
    """Return the table of bounds; what was not measured, as without PyTorch, is left out."""
    found = quantities(results)
    rows = []
    for bound in problems.BOUNDS:
        ours, other = found.get((bound.what, bound.ours)), found.get((bound.what, bound.other))
        if ours is not None and other:
            verdict = '' if ours <= bound.at_most * other else ', not met'
            rows.append((*bound, f'{ours / other:.3g}{verdict}' if ours else 'noise'))
    head = ['problem (forward + backward by default)', 'contender', 'relative to', 'at most', 'measured']
    return table(head, rows)


def quantities(results):
    """Return all that a bound may be about, by (what, contender)."""
    found = {}
    for name, case in results['cases'].items():
        found[name, problems.LIMIT] = case['limit']['both']
        found[f'{name}, peak memory', problems.GRADIENT] = case['gradient']
        for contender, row in case['rows'].items():
            found[name, contender] = row['both']['median']
            found[f'{name}, forward', contender] = row['forward']['median']
            found[f'{name}, peak memory', contender] = row.get('memory')
    for name, metric in results['metrics'].items():
        found[f'{name}, epoch', problems.LIMIT] = metric['limit']
        for contender, row in metric['rows'].items():
            found.update({(f'{name}, {kind}', contender): row[kind] for kind in ('update', 'epoch')})
    return found


def _time(row):
    """Write a median with its quartiles, unless the operator's noise is as large as the loss."""
    median, low, high = (draw.three_digits(row[key] * 1e3) for key in ('median', 'low', 'high'))
    return f'{median} ({low} to {high})' if row['low'] else f'{median} (noise)'


def _ratio(ratio):
    return f'{ratio:.2f}' if ratio >= 0.1 else f'{ratio:.3f}'


def _error(row, kind):
    return f'{row[kind]:.1e}' if kind in row else ''


if __name__ == '__main__':
    main()
