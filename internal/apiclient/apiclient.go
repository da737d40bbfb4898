// Package apiclient is how our tools call the push API: over TLS or not, and with whose credential.
package apiclient

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"google.golang.org/grpc"

	"github.com/push-manager/push-manager/client"
	"github.com/push-manager/push-manager/internal/certs"
	"github.com/push-manager/push-manager/internal/config"
)

// Flags are those of a tool. A secret is none of them: all users of a machine see the command lines of all processes.
type Flags struct {
	TLS       bool   `name:"tls" env:"PUSHCTL_TLS,PUSH_MANAGER_TLS" context:"tls" help:"Speak TLS. Any of the next three does so, too."`
	CA        string `name:"ca" placeholder:"FILE" env:"PUSHCTL_CA,PUSH_MANAGER_CA" context:"ca" predictor:"file" help:"PEM file of the authorities that Push-Manager's certificate is checked with. Default: those of the system."`
	Cert      string `name:"cert" placeholder:"FILE" env:"PUSHCTL_CERT,PUSH_MANAGER_CERT" context:"cert" predictor:"file" help:"PEM file of a certificate to show."`
	Key       string `name:"key" placeholder:"FILE" env:"PUSHCTL_KEY,PUSH_MANAGER_KEY" context:"key" predictor:"file" help:"PEM file of its key."`
	TokenFile string `placeholder:"FILE" env:"PUSHCTL_TOKEN_FILE" context:"token_file" predictor:"file" help:"File with the API key or the token to show. Without it, PUSHCTL_API_KEY or PUSHCTL_TOKEN holds one."`
}

// maxSecret bounds a token; servers take 8 KiB.
const maxSecret = 16 << 10

// Dial are the options of a connection to the addresses, and what is to be called when it is closed. Calls do not wait for a connection.
// Errors name the flag.
func (f *Flags) Dial(addresses ...string) (options []grpc.DialOption, done func(), err error) {
	secret, err := f.Secret()
	if err != nil {
		return nil, nil, err
	}
	// A person, and a measurement, want to see what an instance that is not ready says.
	how := []client.Option{client.WithFailFast(), client.WithoutHealthChecks()}
	if secret != "" {
		how = append(how, client.WithToken(secret))
	}
	if files := (client.TLS{CAFile: f.CA, CertFile: f.Cert, KeyFile: f.Key}); f.TLS || files != (client.TLS{}) {
		how = append(how, client.WithTLS(files))
	}
	options, done, err = client.DialOptions(strings.Join(addresses, ","), how...)
	var file *certs.FileError
	switch {
	case errors.As(err, &file):
		return nil, nil, fmt.Errorf("--%s: %w", strings.TrimSuffix(file.File, "_file"), file.Err)
	case errors.Is(err, client.ErrPlain):
		return nil, nil, fmt.Errorf("--tls: missing: the secret would go to %q in plain text", strings.Join(addresses, ","))
	case err != nil:
		return nil, nil, err
	}
	// Each connection of a tool is to one instance, and with pick_first gRPC says why there is none.
	return append(options, grpc.WithDefaultServiceConfig(`{}`)), done, nil
}

// Secret is the token or the key to show, "" for none. Errors name where it comes from.
func (f *Flags) Secret() (secret string, err error) {
	from := "--token-file"
	switch {
	case f.TokenFile != "":
		text, err := config.ReadFile(f.TokenFile, maxSecret)
		if err != nil {
			return "", fmt.Errorf("%s: %w", from, err)
		}
		if secret = strings.TrimSpace(string(text)); secret == "" {
			return "", fmt.Errorf("%s: %s holds nothing", from, f.TokenFile)
		}
	case os.Getenv("PUSHCTL_API_KEY") != "":
		from = "PUSHCTL_API_KEY"
		secret = strings.TrimSpace(os.Getenv(from))
	default:
		from = "PUSHCTL_TOKEN"
		secret = strings.TrimSpace(os.Getenv(from))
	}
	if strings.ContainsFunc(secret, func(r rune) bool { return r <= ' ' || r > '~' }) {
		return "", errors.New(from + ": must be one token without spaces")
	}
	return secret, nil
}
