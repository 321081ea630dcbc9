"""`latentdiff solvers`: every solver and timetable, one line each."""


def solvers() -> None:
    """List the solvers, one line each, and the timetables.

    Names of other tools for them are taken, too: "DPM++ 2M Karras", dpmpp_2m_karras, euler_a.
    """
    from latentdiff import solvers
    from latentdiff.diffusion import timetable

    width = max(map(len, solvers.names())) + 2
    for name, line in solvers.describe().items():
        print(f"{name:<{width}}{line}")
    print(f"\ntimetables: {' '.join(timetable.names())}")
    print("other tools' names are taken, too: 'DPM++ 2M Karras', dpmpp_2m_karras, euler_a")
