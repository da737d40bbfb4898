// Package apiclient is how our tools call the push API: over TLS or not, and with whose credential.
package apiclient

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/push-manager/push-manager/internal/certs"
	"github.com/push-manager/push-manager/internal/config"
)

// Flags are those of a tool. A secret is none of them: all users of a machine see the command lines of all processes.
type Flags struct {
	TLS       bool   `name:"tls" env:"PUSH_MANAGER_TLS" help:"Speak TLS. Any of the next three does so, too."`
	CA        string `name:"ca" placeholder:"FILE" env:"PUSH_MANAGER_CA" help:"PEM file of the authorities that Push-Manager's certificate is checked with. Default: those of the system."`
	Cert      string `name:"cert" placeholder:"FILE" env:"PUSH_MANAGER_CERT" help:"PEM file of a certificate to show."`
	Key       string `name:"key" placeholder:"FILE" env:"PUSH_MANAGER_KEY" help:"PEM file of its key."`
	TokenFile string `placeholder:"FILE" help:"File with the API key or the token to show. Without it, PUSHCTL_API_KEY or PUSHCTL_TOKEN holds one."`
}

// maxSecret bounds a token; servers take 8 KiB.
const maxSecret = 16 << 10

// Dial are the options of a connection to the addresses, and what is to be called when it is closed. Errors name the flag.
func (f *Flags) Dial(addresses ...string) (options []grpc.DialOption, done func(), err error) {
	secret, err := f.secret()
	if err != nil {
		return nil, nil, err
	}
	files := certs.Files{Cert: f.Cert, Key: f.Key, CA: f.CA}
	if secret != "" {
		options = append(options, grpc.WithPerRPCCredentials(bearer(secret)))
	}
	if !f.TLS && files == (certs.Files{}) {
		for _, address := range addresses {
			if host, _, err := net.SplitHostPort(address); secret != "" && (err != nil || !config.Loopback(host)) {
				return nil, nil, fmt.Errorf("--tls: missing: the secret would go to %q in plain text", address)
			}
		}
		return append(options, grpc.WithTransportCredentials(insecure.NewCredentials())), func() {}, nil
	}
	source, err := certs.Open(certs.Config{Files: files, Role: "client"})
	if err != nil {
		return nil, nil, fmt.Errorf("--%s", strings.Replace(err.Error(), "_file:", ":", 1))
	}
	creds := source.Client(certs.Side{MinVersion: tls.VersionTLS12}) // a proxy may have no more
	return append(options, grpc.WithTransportCredentials(creds)), source.Close, nil
}

// secret is the token or the key to show, "" for none.
func (f *Flags) secret() (secret string, err error) {
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

// bearer shows a secret with each call.
type bearer string

// GetRequestMetadata implements credentials.PerRPCCredentials.
func (b bearer) GetRequestMetadata(context.Context, ...string) (map[string]string, error) {
	return map[string]string{"authorization": "Bearer " + string(b)}, nil
}

// RequireTransportSecurity implements credentials.PerRPCCredentials. Dial has seen to that.
func (bearer) RequireTransportSecurity() bool { return false }
