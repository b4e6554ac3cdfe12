#compdef flowd-rs
# Zsh completion for flowd-rs(8), using the bash completion.

autoload -U +X bashcompinit && bashcompinit
source ${FLOWD_RS_COMPLETION:-/usr/share/bash-completion/completions/flowd-rs}
_bash_complete -F _flowd_rs
