#compdef flowd-rs
# Completion of flowd-rs(8) for zsh: that of bash.

autoload -U +X bashcompinit && bashcompinit
source ${FLOWD_RS_COMPLETION:-/usr/share/bash-completion/completions/flowd-rs}
_bash_complete -F _flowd_rs
