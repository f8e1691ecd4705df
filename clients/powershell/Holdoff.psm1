# Holdoff for PowerShell scripts: a lease around a command or a script block, and error reports.
#
# NOT TRIED: this has never been run, and neither has `holdoff run` on Windows. The tests only parse it.
# It is for PowerShell 7, and compatible with Windows PowerShell 5.1.
#
#   Import-Module ./Holdoff.psm1
#   Invoke-WithLease -Token apps/exact-nl/tokens/finance -Wait 2h -Job nightly { ./Import-All.ps1 }
#   Invoke-WithLease -Token apps/exact-nl/tokens/finance -Wait 2h -Command datahub -ArgumentList '/file:job.sql'
#   exit $LASTEXITCODE
#
# It needs the command `holdoff` on the PATH, and keeps no state.
#Requires -Version 5.1

<#
.SYNOPSIS
Runs a command or a script block while holding a lease on a token.

.DESCRIPTION
$LASTEXITCODE is that of `holdoff run`: the command's own, or 64, 69, 70, 75, 77, 79, 126, 127. A script
block has that of the last program it ran; 1 when it threw.

`holdoff run` starts a process, so a script block runs in a PowerShell of its own. It gets -ArgumentList,
as texts, environment variables and this module; it sees no variable or function of yours ($using: too
means nothing there), and gives back text and an exit code. Its text lies in a temporary file, which only
you can read, for as long as it runs.

.EXAMPLE
Invoke-WithLease apps/exact-nl/tokens/finance -Wait 2h -Division 535193 -ScriptBlock { param($File) datahub "/file:$File" } -ArgumentList nightly.sql
#>
function Invoke-WithLease {
    [CmdletBinding(DefaultParameterSetName = 'ScriptBlock')]
    param(
        [Parameter(Mandatory = $true, Position = 0)] [string] $Token,
        [string] $Wait,
        [switch] $NoWait,
        [string] $Job,
        [string[]] $Division = @(),
        [string[]] $Endpoint = @(),
        # Further options of `holdoff run`, such as '--ttl', '5m', '--log-file', 'job.log'.
        [string[]] $RunOption = @(),
        [Parameter(Mandatory = $true, ParameterSetName = 'ScriptBlock', Position = 1)] [scriptblock] $ScriptBlock,
        [Parameter(Mandatory = $true, ParameterSetName = 'Command')] [string] $Command,
        [string[]] $ArgumentList = @()
    )
    if (-not (Get-Command -Name holdoff -CommandType Application -ErrorAction SilentlyContinue)) {
        throw 'There is no command holdoff on the PATH. Install it (pip install holdoff), or add its folder to $env:PATH.'
    }
    $words = @('run', '--token', $Token)
    if ($Wait) { $words += '--wait', $Wait }
    if ($NoWait) { $words += '--no-wait' }
    if ($Job) { $words += '--job', $Job }
    foreach ($one in $Division) { $words += '--division', $one }
    foreach ($one in $Endpoint) { $words += '--endpoint', $one }
    $words += $RunOption
    $words += '--'
    if ($PSCmdlet.ParameterSetName -eq 'Command') {
        $words += $Command
        $words += $ArgumentList
        Invoke-Holdoff $words
        return
    }
    $name = if ($PSVersionTable.PSEdition -eq 'Core') { 'pwsh' } else { 'powershell' }
    $file = Join-Path ([IO.Path]::GetTempPath()) ('holdoff-' + [guid]::NewGuid() + '.ps1')
    $module = $script:ModulePath -replace "'", "''"
    $lines = "`$ErrorActionPreference = 'Stop'", "Import-Module '$module'", '& {', $ScriptBlock, '} @args', 'exit $LASTEXITCODE'
    try {
        New-PrivateFile $file
        # With a byte order mark, without which 5.1 does not read the file as UTF-8.
        [IO.File]::WriteAllText($file, ($lines -join "`n"), (New-Object System.Text.UTF8Encoding $true))
        $words += (Join-Path $PSHOME $name), '-NoProfile', '-NonInteractive'
        # Only Windows has execution policies: that of this process has allowed this module.
        if ($name -eq 'powershell' -or $IsWindows) { $words += '-ExecutionPolicy', 'Bypass' }
        $words += '-File', $file
        $words += $ArgumentList
        Invoke-Holdoff $words
    }
    finally {
        Remove-Item -LiteralPath $file -ErrorAction SilentlyContinue
    }
}

<#
.SYNOPSIS
Reports an error of the provider to `holdoff run`, which reads the output: it is counted once. The key of
the run, HOLDOFF_REPORT_KEY, distinguishes this report from the same text in data.

.EXAMPLE
Write-HoldoffError -Division 535193 -Endpoint crm/Accounts -Status 400
#>
function Write-HoldoffError {
    [CmdletBinding()]
    param(
        [string] $Division,
        [string] $Endpoint,
        [string] $Status
    )
    # A query or fragment in a URL does not count, and may be secret; so may a password before the host.
    $path = $Endpoint -replace '(?s)[?#].*', '' -replace '//[^/@]*@', '//'
    Write-HoldoffLine 'ERROR' @(('status', $Status), ('division', $Division), ('endpoint', $path))
}

<#
.SYNOPSIS
Reports to `holdoff run` that the provider refuses all calls.

.EXAMPLE
Write-HoldoffBlocked -Status 429 -RetryAfter 60
#>
function Write-HoldoffBlocked {
    [CmdletBinding()]
    param(
        [string] $Status,
        # The value of the response's header Retry-After.
        [string] $RetryAfter
    )
    Write-HoldoffLine 'BLOCKED' @(('status', $Status), ('retry_after', $RetryAfter))
}

# Writes to the process's own stderr, which no pipeline or variable captures. A value can contain neither
# a quote nor an end of line.
function Write-HoldoffLine([string] $Kind, [object[]] $Fields) {
    $line = "HOLDOFF-$Kind"
    if ($env:HOLDOFF_REPORT_KEY) { $line += " key=$env:HOLDOFF_REPORT_KEY" }
    else {
        [Console]::Error.WriteLine('holdoff: HOLDOFF_REPORT_KEY is not set, so this report counts only under holdoff run --trust-output')
    }
    foreach ($field in $Fields) {
        $value = $field[1] -replace '["\p{Cc}]', ''
        if ($value) { $line += ' {0}="{1}"' -f $field[0], $value }
    }
    [Console]::Error.WriteLine($line)
}

# Programs get words as they are written here. Before 7.3 PowerShell removed quotes and empty words.
function Invoke-Holdoff([string[]] $Words) {
    if ($PSVersionTable.PSVersion -lt [version] '7.3') {
        $Words = foreach ($word in $Words) { if ($word) { $word -replace '(\\*)"', '$1$1\"' } else { '""' } }
    }
    & (Get-Command -Name holdoff -CommandType Application | Select-Object -First 1) @Words
}

# On Windows the folder for temporary files belongs to the user; elsewhere it is shared.
function New-PrivateFile([string] $Path) {
    [IO.File]::Create($Path).Dispose()
    if ($PSVersionTable.PSEdition -eq 'Core' -and -not $IsWindows) { chmod 600 $Path }
}

$script:ModulePath = $PSCommandPath
Export-ModuleMember -Function @('Invoke-WithLease', 'Write-HoldoffError', 'Write-HoldoffBlocked')
