"""Small changes of source code, of Python by its syntax tree and of C++ by regular expressions.

A mutant is (begin, end, text): the bytes of the source from begin to end are replaced by the text.
"""

import ast
import builtins
import re
from typing import Iterator, Tuple

Mutant = Tuple[int, int, str]

OPERATORS = {
    **{'==': ['!='], '!=': ['=='], 'is': ['is not'], 'is not': ['is'], 'in': ['not in'], 'not in': ['in']},
    **{'<': ['<=', '>='], '<=': ['<', '>'], '>': ['>=', '<='], '>=': ['>', '<']},
    **{'+': ['-'], '-': ['+'], '*': ['/'], '/': ['*'], '%': ['*'], '**': ['*'], '&': ['|'], '|': ['&']},
    **{'and': ['or'], 'or': ['and'], '&&': ['||'], '||': ['&&'], '<<': ['>>'], '>>': ['<<']},
    **{'+=': ['-='], '*=': ['/='], 'std::min': ['std::max'], 'std::max': ['std::min']},
}
SYMBOL = re.compile(r'\*\*|[<>=!]=|[-<>+*/%&|]|\b(?:is not|not in|is|in|and|or)\b')


class Python:
    """The mutants of a module."""

    def __init__(self, source: bytes) -> None:
        self.source = source
        self.line_starts = [0]
        for line in source.splitlines(keepends=True):
            self.line_starts.append(self.line_starts[-1] + len(line))

    def mutants(self) -> Iterator[Mutant]:
        for node in _code(ast.parse(self.source)):
            visit = getattr(self, f'visit_{type(node).__name__}', None)
            yield from visit(node) if visit else ()

    def span(self, node: ast.AST) -> Tuple[int, int]:
        begin = self.line_starts[node.lineno - 1] + node.col_offset
        return begin, self.line_starts[node.end_lineno - 1] + node.end_col_offset

    def text(self, node: ast.AST) -> str:
        begin, end = self.span(node)
        return self.source[begin:end].decode()

    def replaced(self, node: ast.AST, *texts: str) -> Iterator[Mutant]:
        for text in texts:
            yield (*self.span(node), text)

    def between(self, left: ast.AST, right: ast.AST) -> Iterator[Mutant]:
        """Other operators in the place of the one between two operands."""
        begin, end = self.span(left)[1], self.span(right)[0]
        symbol = SYMBOL.search(self.source[begin:end].decode())
        for text in OPERATORS.get(symbol.group(), ()):
            yield begin + symbol.start(), begin + symbol.end(), text

    def condition(self, node: ast.AST) -> Iterator[Mutant]:
        return self.replaced(node, 'True', 'False')

    def visit_Compare(self, node):  # noqa: N802, as ast names them
        operands = [node.left, *node.comparators]
        for left, right in zip(operands, operands[1:]):
            yield from self.between(left, right)

    def visit_BoolOp(self, node):  # noqa: N802
        yield from self.between(*node.values[:2])
        for value in node.values:
            yield from self.condition(value)

    def visit_BinOp(self, node):  # noqa: N802
        yield from self.between(node.left, node.right)
        if isinstance(node.op, (ast.Sub, ast.Div, ast.Mod, ast.Pow)):
            symbol = {ast.Sub: '-', ast.Div: '/', ast.Mod: '%', ast.Pow: '**'}[type(node.op)]
            yield from self.replaced(node, f'(({self.text(node.right)}) {symbol} ({self.text(node.left)}))')

    def visit_UnaryOp(self, node):  # noqa: N802
        return self.replaced(node, f'({self.text(node.operand)})')

    def visit_If(self, node):  # noqa: N802
        return self.condition(node.test)

    visit_IfExp = visit_While = visit_If  # noqa: N815

    def visit_comprehension(self, node):
        for condition in node.ifs:
            yield from self.condition(condition)

    def visit_Constant(self, node):  # noqa: N802
        value = node.value
        if isinstance(value, bool):
            return self.replaced(node, str(not value))
        if isinstance(value, int):
            return self.replaced(node, str(value + 1))
        if isinstance(value, float):
            return self.replaced(node, repr(value * 2 or 1.0))
        is_name = isinstance(value, str) and ' ' not in value
        return self.replaced(node, repr(value + '_')) if is_name else ()

    def visit_Call(self, node):  # noqa: N802
        """The first argument in the place of the call, the branches of `where`; and each keyword left out."""
        name = self.text(node.func)
        arguments = [
            a for a in node.args if self.text(a) not in ('F', 'call') and not isinstance(a, ast.Starred)
        ]
        if not (hasattr(builtins, name) or (name[0].isupper() and '.' not in name)):
            for argument in arguments[1:] if name.endswith('.where') else arguments[:1]:
                yield from self.replaced(node, f'({self.text(argument)})')
        for keyword in node.keywords:
            begin, end = self.span(keyword)
            yield begin, end + len(re.match(rb'\s*,?', self.source[end:]).group()), ''

    def visit_Expr(self, node):  # noqa: N802
        return self.replaced(node, 'pass')

    visit_Raise = visit_AugAssign = visit_Expr  # noqa: N815


def _code(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes below, but for annotations, decorators, docstrings and the messages of errors."""
    for name, child in ast.iter_fields(node):
        for item in child if isinstance(child, list) else [child]:
            is_text = isinstance(item, ast.Expr) and isinstance(item.value, ast.Constant)
            if (
                not isinstance(item, ast.AST)
                or is_text
                or name in ('annotation', 'returns', 'decorator_list')
            ):
                continue
            yield item
            if not isinstance(item, (ast.Raise, ast.JoinedStr)):
                yield from _code(item)


NUMBER = r'(?<![\w.])(?:0x[\da-f]+|\d+\.?\d*(?:e[-+]?\d+)?f?)(?![\w.])'
CPP = re.compile(
    rf'(?P<operator> (?:[<>=!]=|[<>]|\+=|\*=|[-+*/%&|]|&&|\|\||<<|>>) |std::(?:min|max)\b)'
    rf'|(?P<number>{NUMBER})|(?P<sign>(?<=, )-|(?<=\()-(?!-)|(?<=\()!)|(?P<condition> \? )'
)
STATEMENT = re.compile(r'^ *(?:[\w>.\[\]-]+ (?:[-+*|]?=) .*|[\w.:>-]+\(.*\));$')
COMMENTS = re.compile(rb'//[^\n]*|/\*.*?\*/|^#[^\n]*|"[^"\n]*"', re.DOTALL | re.MULTILINE)


def cpp_mutants(source: bytes) -> Iterator[Mutant]:
    """The mutants of a C++ file, on its lines of code."""
    code = COMMENTS.sub(lambda match: re.sub(rb'[^\n]', b' ', match.group()), source).decode('latin-1')
    for match in CPP.finditer(code):
        yield from _cpp_replaced(match)
    for match in re.finditer(r'\bif \(', code):
        yield match.end(), match.end(), 'true || '
        yield match.end(), match.end(), 'false && '
    begin = 0
    for line in code.splitlines(keepends=True):
        if STATEMENT.match(line.rstrip()):
            yield begin, begin + len(line.rstrip()), ';'
        begin += len(line)


def _cpp_replaced(match: 're.Match') -> Iterator[Mutant]:
    text = match.group()
    if match.group('operator'):
        texts = [text.replace(text.strip(), other) for other in OPERATORS.get(text.strip(), ())]
    elif match.group('number'):
        texts = [f'({text} * 2)' if '.' in text else f'({text} + 1)']
    else:
        texts = [' == 0 ? ' if match.group('condition') else '']
    for other in texts:
        yield (*match.span(), other)


def mutants_of(name: str, source: bytes) -> Iterator[Mutant]:
    """All mutants of a file, in its order."""
    mutants = Python(source).mutants() if name.endswith('.py') else cpp_mutants(source)
    return iter(sorted(set(mutants)))
