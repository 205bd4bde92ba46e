"""Pictures that teach: the prefix tree with its exact values, the automaton with its turns, a row of tokens with its credit.

Every picture is drawn from plain data that a function of its own computes (`tree_graph`, `automaton_graph`, `credit_of`), and
each number on it carries a gid ("v-3", "q-5", "D-2"), so that what a reader sees can be compared with the truth.
"""

from shiq_lab.pictures.automaton import automaton_figure
from shiq_lab.pictures.credit import Credit, credit_of, trajectory_figure
from shiq_lab.pictures.graphs import Edge, Graph, Node, automaton_graph, tree_graph
from shiq_lab.pictures.tree import tree_figure

__all__ = [
    "Credit",
    "Edge",
    "Graph",
    "Node",
    "automaton_figure",
    "automaton_graph",
    "credit_of",
    "trajectory_figure",
    "tree_figure",
    "tree_graph",
]  # fmt: skip
